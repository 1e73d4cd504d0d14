"""Files of tokens and their suffix arrays: written once, read through the page cache."""
