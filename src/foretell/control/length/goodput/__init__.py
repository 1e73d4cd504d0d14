"""The goodput policy: what it chooses, what it knows of texts, drafters and the machine."""
