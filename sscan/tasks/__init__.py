"""What models are trained on, one file each, and the loop that trains them."""
