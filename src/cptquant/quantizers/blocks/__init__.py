"""Learning block by block: layers that quantize anew in each pass, and the loop that trains a block of them."""
