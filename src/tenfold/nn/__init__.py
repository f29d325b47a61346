"""Parameters declared once, the layers that use them, and the checkpoints that hold them."""
