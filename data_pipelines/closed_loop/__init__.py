"""Driving in a closed loop: what a policy plans is driven, and what it sees follows from it."""
