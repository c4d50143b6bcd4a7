"""The DAAM paper's experiments on generated images (Tang et al. 2023, arXiv:2210.04885): `conceptseg-study --help`."""
