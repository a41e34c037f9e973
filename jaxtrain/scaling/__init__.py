"""`jaxtrain scale`: how throughput grows with devices, where the time goes, and what would help."""
