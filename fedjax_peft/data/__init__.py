"""Client data on the host: flat stores, partitions, readers. numpy only."""
