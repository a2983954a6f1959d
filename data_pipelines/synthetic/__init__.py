"""A procedural driving world in the nuScenes layout."""
