"""The measurements behind bench.py, and the roofline that predicts them."""
