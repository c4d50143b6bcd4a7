"""python -m conceptseg, and so torchrun -m conceptseg."""

from conceptseg.cli.evaluate import evaluate

if __name__ == "__main__":
    evaluate()
