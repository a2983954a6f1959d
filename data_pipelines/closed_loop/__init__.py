"""Driving in a closed loop: what a policy plans is driven, and what it then sees follows from it."""
