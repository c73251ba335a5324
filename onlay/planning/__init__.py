"""Before a GPU is rented: parameters, memory, time and cost of a run, and advice on its settings."""
