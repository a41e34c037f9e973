"""`jaxtrain bench comm`: how long each way to add up gradients takes, and whether it sends the bytes that it should."""
