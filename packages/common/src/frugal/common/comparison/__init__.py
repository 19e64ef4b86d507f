"""Methods compared under equal budgets: what is compared, its budgets, its runs and its pages."""
