"""Load trained nets, and measure and explain their answers."""
