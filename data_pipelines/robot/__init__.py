"""Robot manipulation: environments, demonstrations, and policies run against them."""
