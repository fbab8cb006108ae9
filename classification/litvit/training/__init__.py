"""Training and evaluation of image classifiers: recipe, data, optimizer, loop, run folder."""
