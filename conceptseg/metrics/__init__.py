"""From integer counts to named, defined numbers with intervals. Nothing is imported here: reports stay free of torch."""
