"""Whether a run fits the devices, where its memory peaks, and how long it takes, without weights or a step."""
