"""Jobs: what is to be run is described in a file, submitted to a queue or a scheduler, looked at, stopped and resumed."""
