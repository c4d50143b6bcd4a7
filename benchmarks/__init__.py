"""Quoted numbers, which ship with the package as conceptseg.benchmarks; results of tables stay in the repository."""
