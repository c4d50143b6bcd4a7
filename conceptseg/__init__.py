"""conceptseg: how well does a model know where a word is in a picture, without any training?"""

__version__ = "0.1.0"
