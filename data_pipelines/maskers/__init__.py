"""Foreground maskers: pictures to class maps. One file per way, `interface` is what they share."""
