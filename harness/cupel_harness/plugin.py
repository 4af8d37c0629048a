"""pytest plugin: glue between suites and evidence."""
