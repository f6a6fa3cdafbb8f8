"""The search behind ``passes="auto"``: which mix of precisions holds the accuracy and is fastest."""
