"""How much verification rules accept, beside the most that any rule could."""
