"""The probe examined: on controls, on clean engines, beside another tool."""
