"""`jaxtrain sweep`: many runs that differ in some settings, as one thing that can be stopped and goes on."""
