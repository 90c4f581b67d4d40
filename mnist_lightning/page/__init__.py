"""Make the page to draw on, which shows how a net works inside."""
