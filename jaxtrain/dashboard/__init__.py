"""`jaxtrain dashboard`: a page to watch runs on. It reads what runs write, and changes nothing."""
