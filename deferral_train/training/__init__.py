"""Training of heads with Lightning, and regret tracked while they learn. Import the parts by module."""
