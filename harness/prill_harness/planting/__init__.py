"""How a fault is planted, suspended and restored; which faults there are is not known here."""
