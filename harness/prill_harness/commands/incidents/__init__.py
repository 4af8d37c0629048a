"""Commands on what outlives one run: incidents and waivers."""
