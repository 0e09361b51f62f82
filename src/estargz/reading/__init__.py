"""Reading a layer: where its bytes are -> footer -> table of contents -> entry -> chunk -> verified bytes."""
