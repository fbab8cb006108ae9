"""What benchmark.py measures: classifiers, merging, attention, dense backbones and the input pipeline."""
