"""Give every layer its weight bits by HAWQ-V2 sensitivities under a budget."""
