// Starts a run with pgflow's client, says so, waits until the run has ended, and tells what the client saw of it.
// Arguments: the flow's slug and its input. libpq's environment names the database.
import { PgflowClient } from '@pgflow/client';
import postgres from 'postgres';

const [flowSlug, input] = process.argv.slice(2);
const say = console.log;
console.log = console.error; // where the client reports what it does

const sql = postgres({ onnotice: () => {} });

// What the client needs of Supabase: two functions of pgflow, and the broadcasts of realtime.send().
const calls = {
  start_flow_with_states: ({ flow_slug, input, run_id }) =>
    sql`select pgflow.start_flow_with_states(${flow_slug}, ${sql.json(input)}, ${run_id}) as data`,
  get_run_with_states: ({ run_id }) => sql`select pgflow.get_run_with_states(${run_id}) as data`,
};
const supabase = {
  schema: () => ({
    rpc: async (name, args) => ({ data: (await calls[name](args))[0].data, error: null }),
  }),
  channel: (topic) => {
    let received;
    let listening;
    return {
      on: (type, _filter, callback) => {
        if (type === 'broadcast') received = callback;
      },
      subscribe: async (callback) => {
        listening = await sql.listen('realtime', (text) => {
          const message = JSON.parse(text);
          if (message.topic === topic) received({ type: 'broadcast', ...message });
        });
        callback?.('SUBSCRIBED');
      },
      unsubscribe: () => listening.unlisten(),
    };
  },
};

const newClient = () => new PgflowClient(supabase, { realtimeStabilizationDelayMs: 0 });
const ended = (run) =>
  new Promise((resolve) => {
    run.on('completed', resolve);
    run.on('failed', resolve);
  });
const view = (run, steps) => ({
  status: run.status,
  output: run.output,
  error: run.error_message,
  remaining: run.remaining_steps,
  steps: Object.fromEntries(
    steps.map((slug) => {
      const { status, output, error_message: error } = run.step(slug);
      return [slug, { status, output, error }];
    }),
  ),
});

const starter = newClient();
const events = [];
starter.onRunEvent((event) => events.push(event.event_type));
starter.onStepEvent((event) => events.push(`${event.event_type} ${event.step_slug}`));
const started = await starter.startFlow(flowSlug, JSON.parse(input));
const watched = await newClient().getRun(started.run_id);
const { steps: states } = await starter.getRunWithStates(started.run_id);
const steps = states.map((state) => state.step_slug);
const ends = Promise.all([ended(started), ended(watched)]);
say(JSON.stringify({ run_id: started.run_id, ...view(started, steps) }));

await ends;
const later = await newClient().getRun(started.run_id);
say(JSON.stringify({ events, started: view(started, steps), watched: view(watched, steps), later: view(later, steps) }));
await sql.end();
