"""Find KAN layers in the flow and write each as expansions and one linear map."""
