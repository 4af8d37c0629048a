"""The examination of the probe: on controls, on clean engines, against another tool."""
