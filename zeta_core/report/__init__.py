"""What a run says: lines of the journal, and curves for trackers."""
