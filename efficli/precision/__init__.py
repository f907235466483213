"""Which type each tensor of a file gets: what the types cost, what they lose, and the search for the best choice."""
