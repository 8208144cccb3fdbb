"""Follow by element ids what every element of a traced network depends on."""
