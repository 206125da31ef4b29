"""What Snakemake reads when it parses the Snakefile. Imports yaml and jsonschema at most: it runs again in every job."""
