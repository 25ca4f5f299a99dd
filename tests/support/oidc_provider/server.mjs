// A real OpenID provider (the npm package oidc-provider) for tests/support/oidc.py, which passes the settings as JSON.
// Lines on standard input: {"keys": [JWK...]} changes the keys, {"configuration": {...}} the configuration,
// {"clients": [...]} the clients; each is answered by a line.  It ends with its standard input.
import { createServer } from "node:http";
import { createServer as createTlsServer } from "node:https";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { Provider } from "oidc-provider";

const settings = JSON.parse(process.argv[2]);
let { keys, configuration, clients } = settings;
let callback;

function renew() {
  const provider = new Provider(settings.issuer, {
    claims: {
      openid: ["sub"],
      profile: ["preferred_username", "name"],
      email: ["email", "email_verified"],
      groups: ["groups", "realm_access"],
    },
    clients,
    cookies: { keys: ["a key of the tests"] },
    jwks: { keys },
    ttl: { Session: 3600, Grant: 3600, Interaction: 3600, AccessToken: 3600, IdToken: 3600, AuthorizationCode: 60 },
    features: {
      backchannelLogout: { enabled: true },
      devInteractions: { enabled: true },
      jwtUserinfo: { enabled: true },
      rpInitiatedLogout: { enabled: true },
    },
    fetch: (url, { dispatcher, ...options }) => fetch(url, options), // without its check: to loopback addresses, too
    findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id, ...settings.people[id] }) }),
    // Nobody is asked for consent.
    async loadExistingGrant(context) {
      const { client, session, provider, params } = context.oidc;
      const before = session.grantIdFor(client.clientId);
      if (before) return provider.Grant.find(before); // a new one would end what another tab has begun
      const grant = new provider.Grant({ clientId: client.clientId, accountId: session.accountId });
      grant.addOIDCScope(params.scope);
      await grant.save();
      return grant;
    },
    ...configuration,
  });
  for (const event of ["backchannel.error", "server_error"])
    provider.on(event, (_, error) => console.error(event, error));
  provider.proxy = false;
  callback = provider.callback();
}

renew();
const serve = (request, response) => callback(request, response);
const server = settings.tls
  ? createTlsServer({ cert: readFileSync(settings.tls[0]), key: readFileSync(settings.tls[1]) }, serve)
  : createServer(serve);
server.listen(settings.port, "127.0.0.1", () => console.log("ready"));
createInterface({ input: process.stdin })
  .on("line", (line) => {
    ({ keys = keys, configuration = configuration, clients = clients } = JSON.parse(line));
    renew();
    console.log("done");
  })
  .on("close", () => process.exit());
