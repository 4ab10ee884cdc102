// Before any test: the services must be there. `bun run test` finds or starts them.
for (const name of ["DATABASE_URL", "AMQP_URL"]) {
  if (!Bun.env[name]) {
    console.error(
      `The tests need a real MySQL and RabbitMQ: ${name} is not set. Run \`bun run test\`, which finds or starts both`,
    );
    process.exit(1);
  }
}
