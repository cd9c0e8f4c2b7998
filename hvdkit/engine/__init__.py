"""What happens between a framework's call and a collective: order, overlap, buckets."""
