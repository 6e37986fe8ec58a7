"""Constants of the scan that modules need before torch has been imported."""

DIRECTIONS = ("left_to_right", "right_to_left", "top_to_bottom", "bottom_to_top")

SATURATION = -28.0  # logits are clamped to this minimum
