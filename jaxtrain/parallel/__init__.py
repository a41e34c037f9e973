"""How the state and the batch are laid out over the devices. The rest of the program does not know how many there are."""
