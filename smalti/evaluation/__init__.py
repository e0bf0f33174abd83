"""How good images are: features of them, statistics of the features, and the numbers that papers print."""
