"""Networks, data and recipes drawn from a number, compiled and compared at every stage."""
