"""How the state and the work are laid over the devices. Nothing outside this package knows how many there are."""
