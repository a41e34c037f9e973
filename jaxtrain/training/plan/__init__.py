"""Plans a layout: which are legal, what each needs and how fast it should be. `search.plan` is the door."""
