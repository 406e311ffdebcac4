// Makes what the package has of the repository: the schema, without the rules that the broker holds requests to, and the
// service config.
import { copyFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import protobuf from 'protobufjs';

const here = dirname(fileURLToPath(import.meta.url));
const repository = join(here, '..', '..');
const root = new protobuf.Root();
// protobufjs brings google/protobuf itself. An import that is resolved to nothing is left out.
root.resolvePath = (_, path) => (path.startsWith('buf/validate/') ? null : path);
root.loadSync([join(repository, 'proto', 'tokenbroker', 'v1', 'token_broker.proto'), join(here, 'google_rpc.proto')]);
const rules = (key, value) => (key === 'options' || key === 'parsedOptions' ? undefined : value);
writeFileSync(join(here, 'schema.json'), `${JSON.stringify(root.toJSON(), rules, 1)}\n`);
copyFileSync(join(repository, 'clients', 'service_config.json'), join(here, 'service_config.json'));
